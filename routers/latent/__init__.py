"""What latent collaboration learns: who writes, who is listened to, and what they say."""
