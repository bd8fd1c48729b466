"""English word lists that come with the repository: function words, and the synonyms of WordNet 3.0. Nothing is fetched at run time."""
