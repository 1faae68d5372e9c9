"""The built-in routing rules, one file each; a rule is called by its file's name. The contract: moma_jax/router.py."""
