"""Tables, statistics, plots and the report, made from receipts and predictions. Imports no torch."""
