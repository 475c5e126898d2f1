"""The statistics: one file each. Importing this package imports none of them; `pipeline.registry` finds them."""
