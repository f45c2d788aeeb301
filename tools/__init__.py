"""Scripts for those who change the repository; nothing here is installed."""
