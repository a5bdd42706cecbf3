"""`modekit report`: one page that shows what a mixture is and is worth; the model card; push."""
