"""Files of data sets, synthetic sets and networks, from these scripts or from others."""
