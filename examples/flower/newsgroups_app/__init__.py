"""MiniLM with LoRA on 20 Newsgroups, as a Flower app."""
