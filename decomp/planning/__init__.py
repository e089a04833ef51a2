"""The decision: candidates and their costs, budgets, the plan, and what is built of it."""
