"""Teacher and dataset → signals: what the teacher believes at each token, kept sparse."""
