"""Plans: candidates and their costs, budgets, the choice of methods and ranks, and the layers built from it."""
