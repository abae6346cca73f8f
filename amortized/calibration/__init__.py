"""Whether a sampler draws from the posterior: checks that take any sampler, as a plain function.

    from amortized.calibration import joint, report
    them = joint.draw(key, simulate, sampler, num_simulations=1000, num_samples=199)
    report.run(key, them)

with simulate(key) -> (theta, x) and sampler(key, x, num_samples) -> draws: a network, NUTS,
tempered SMC, strings.

| module | what it asks |
| --- | --- |
| `joint` | parameters, what they generated, and posterior draws for each |
| `sbc` | is the truth's rank among the draws uniform, of each coordinate or any quantity? |
| `tarp` | and that of its distance from a point that depends on x? |
| `coverage` | do intervals, and regions of highest density, hold the truth as often as they say? |
| `c2st`, `lc2st` | can a network tell draws from a reference; from the truth, for one x? |
| `predictive` | would data like these have come of the posterior? |
| `misspecification` | is an observation like the simulations at all? |
| `report`, `pictures` | one table with p-values, one figure |
| `uniform`, `classifier` | the tests of uniformity, and the networks, that these share |
"""
