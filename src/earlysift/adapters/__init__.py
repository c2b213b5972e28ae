"""Adapters: a `Sifter` inside other people's training loops. Each needs its own extra and is imported by name."""
