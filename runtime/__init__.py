"""What keeps a run alive, fast and safe. Nothing here decides about the method; nothing here imports a file from upstairs.

Data and networks   datasets, pool, turns (of the classes), streams (of random numbers), formats (of files)
A run               command_line, device, plan (what it costs), timer, run_folder (what it writes), saved_state, parallel
Speed               fast (compilation, precision, memory)
Safety              safe_io (reading what others wrote, writing whole files), audit (of an attack), autoattack (the package)
Results             results (what the files hold), sources and jobs (input and work of evaluate.py), tables, pictures
"""
