"""What a run needs beside the method. Imports nothing from outside this package.

| Module | Content |
|---|---|
| seeding | random generators, all derived from --seed |
| command_line | argument types, groups of flags, errors in one line |
| device | CPU or GPU, micro batch size, versions |
| compilation, cuda_graphs | torch.compile, precision, CUDA graphs |
| distributed | processes of torchrun: shards, sums, barriers, a queue of tasks |
| training | a training step on a batch that processes share |
| checkpoint | saved states, signals, locks |
| run_directory | all that a ROME script writes |
| cost, progress | forward-backward passes and hours that a run takes |
| safe_io | reading untrusted files, writing files whole |
| perturbation | check that adversarial images are valid and within eps |
| autoattack | AutoAttack and Square of the package pyautoattack |
| tasks | tasks of evaluate.py and their results.json |
| measures | names of the accuracies in files and tables |
"""
