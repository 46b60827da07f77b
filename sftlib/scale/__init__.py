"""What changes with size: bytes, and processes.

| file | what it does |
|---|---|
| `memory` | parameters and bytes, counted from shapes before anything is loaded |
| `measure` | the same bytes, measured while a training runs |
| `launch` | start a script on several ranks from a notebook, and say where they hang |
| `rank_process` | what each of these processes runs around the script |
"""
