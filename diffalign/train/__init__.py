"""Fine-tuning: one loop on Accelerate, an objective per paper, and a watch over what the reward does to the model."""
