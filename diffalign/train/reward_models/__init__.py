"""Reward models: taught what people, or a judge, prefer, by the same steps as everything else that trains."""
