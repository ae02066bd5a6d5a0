"""What runs a partitioned model over ranks: exchange, order of work, application."""
