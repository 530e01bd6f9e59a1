"""Reinforcement learning from a reward: rollouts, rewards, KL, advantages, losses and the trainer."""
