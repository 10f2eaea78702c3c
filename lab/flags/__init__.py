"""What may stand on a command line: flags that commands share, and what people mean when they mistype."""
