"""What the command ``hfh`` runs."""
