"""``hfh demo``: a compressed network on real data, and the speed of a compressed layer."""
