"""From result files to tables and plots.

| Module | Content |
|---|---|
| records | rows of results.json, events of metrics.jsonl: read and checked |
| metrics | robustness metrics and transfer of attacks between networks |
| tables | Markdown and CSV; accuracies, metrics, runs |
| statistics | sets of several seeds, differences and their intervals |
| leaderboard | the sets of leaderboard.json side by side |
| results_md | results.md of evaluate.py |
| plots | matplotlib figures |
"""
