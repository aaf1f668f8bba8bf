"""One file per adapter method; `fura_rl.adapters.registry` is the table of them."""
