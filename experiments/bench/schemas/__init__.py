"""JSON schemas as people write them, and what becomes of each: tables, a parser, or a refusal."""
