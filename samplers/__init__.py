"""How targets are sampled.  This is the map; a user writes the family and the module.

    from samplers import smc                    smc.run(key, target)
    from samplers.mcmc import suffix            suffix.kernel(target)

| room | what is in it |
| --- | --- |
| `base`, `kernels`, `resampling`, `diagnostics`, `results`, `registry`, `testing` | the ground |
| `strings` | the engine that extends strings, proposals, selection, cuts, ladders, prompts |
| `draws` | independent draws |
| `mcmc` | kernels over strings, and what runs them |
| `canvas` | unmasking of any-order models, weighted for a target or as diffusion does |
| `smc` | sequential Monte Carlo and its thin, paper-named compositions |
| `latent` | continuous latents: tempered SMC, filters, PMMH, SMC^2, models with a text site |
| `search` | choices without a target |

A family imports those above it in this list and never those below; `draws`, `mcmc` and `canvas` are
siblings, `smc` and `latent` too.  `python -m samplers.registry` lists every sampler with its
guarantee and its proof.
"""
