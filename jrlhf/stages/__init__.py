"""The stages (SFT, the reward model, PPO, GRPO), the table of them, and the pipeline that runs them in order."""
