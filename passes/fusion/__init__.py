"""Rules: each rewrite of a few operators into fewer. A file holds one family."""
