"""From result files to tables and plots.

| Module | Content |
|---|---|
| records | rows of results.json, events of metrics.jsonl: read and checked |
| metrics | robustness metrics and transfer of attacks between networks |
| statistics | means over seeds, differences and their intervals |
| tables | Markdown and CSV |
| results_md | results.md of evaluate.py |
| plots | matplotlib figures |
"""
