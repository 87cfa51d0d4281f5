"""The packaged recipes: one YAML each, found by name (``dpp configs`` lists them)."""
