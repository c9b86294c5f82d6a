"""Real federated runs on real data: what the methods do, shown with progress, a table and a picture."""
