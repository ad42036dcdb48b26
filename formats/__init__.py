"""Files of data sets, synthetic sets and networks, from these scripts or from others.

| Module | Content |
|---|---|
| arrays | images and labels of a data set, as uint8 and int64 arrays |
| layouts | what stands where in a file or folder of synthetic sets |
| image_checks | how stored images seem to be normalised and packed |
| synset_file | synthetic sets: read, checked, normalised, written |
| network_file | state_dicts: read, checked, loaded into a network |
| inputs | synthetic sets and networks on the command line, against their data set |
"""
