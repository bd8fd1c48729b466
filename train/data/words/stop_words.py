"""The function words of English that say little about a picture: the 179 of NLTK's list "english", by kind."""

PRONOUNS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its itself
they them their theirs themselves what which who whom this that these those you're you've you'll you'd she's it's that'll
"""
VERBS = """
am is are was were be been being have has had having do does did doing can will should should've
"""
CONJUNCTIONS_AND_PREPOSITIONS = """
and but if or because as until while of at by for with about against between into through during before after above below to from
up down in out on off over under than
"""
ADVERBS_AND_DETERMINERS = """
a an the again further then once here there when where why how all any both each few more most other some such no nor not only own
same so too very just now
"""
# What tokenizers leave of "it's", "don't", "y'all", ...; and whole contractions with "not".
CONTRACTIONS = """
s t d ll m o re ve y ma ain don don't aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven haven't
isn isn't mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won won't
wouldn wouldn't
"""

STOP_WORDS = frozenset(
    " ".join((PRONOUNS, VERBS, CONJUNCTIONS_AND_PREPOSITIONS, ADVERBS_AND_DETERMINERS, CONTRACTIONS)).split()
)
