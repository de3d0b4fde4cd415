"""Made of finished runs: pictures, figures, the overview, the report."""
