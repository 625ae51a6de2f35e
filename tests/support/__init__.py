"""What several tests share: random products, what bounds them, and how they are run."""
