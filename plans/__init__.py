"""The language all of migrator speaks: styles, placements, meshes, dialects, plans, rules and errors."""
