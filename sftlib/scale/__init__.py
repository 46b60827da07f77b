"""What grows with the model: memory, and the number of processes.

| file | what it does |
|---|---|
| `memory` | parameters and bytes, counted from shapes before anything is loaded |
| `planner` | which settings of ZeRO fit into GPUs and main memory |
| `measure` | the same bytes, measured while a training runs |
| `launch` | start a script on several ranks from a notebook, and say where they hang |
| `rank` | one of these processes as the launcher sees it |
| `rank_process` | what runs in each of these processes, around the script |
"""
