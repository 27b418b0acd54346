"""The HFH toolkit, built on hfh_kernels, and the command ``hfh``."""
