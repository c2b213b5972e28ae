"""Arms of training on equal budgets of reference time, and a verdict that can say "no gain"."""
