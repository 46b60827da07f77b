"""Take a finetuned model out of Transformers, and use it.

| file | what it does |
|---|---|
| `merge` | an adapter and its base → one model folder |
| `export` | a model folder → a GGUF file, and both compared token for token |
| `portable` | the chat template and stop tokens as other programs know them |
| `serving` | an OpenAI-compatible server for a GGUF file, on this machine alone |
| `talk` | a conversation in the terminal or in a notebook |
"""
