"""The networks in plain torch, and everything that turns weight files into them."""
