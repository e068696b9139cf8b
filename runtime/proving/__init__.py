"""`migrator prove`: the plans of config classes run on tiny models, beside the same models unsharded."""
