"""Every reason for which a plan is refused on a model, before anything is sharded."""
