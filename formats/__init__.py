"""Files of data sets, synthetic sets and networks, from these scripts or from others.

arrays: images and labels of a data set. layouts: what stands where in a file of synthetic sets.
image_checks: how images seem to be normalised and packed. synset_file, network_file: sets and
networks, checked. inputs: sets and networks of the command line, against their data set.
"""
