"""What was decided and measured: profiles, comparisons, trade-offs, figures."""
