"""Reports about models: answers before and after training, comparisons, plots."""
