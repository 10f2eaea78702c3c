/* From the shell to llama.cpp's first token: first_token MODEL THREADS PROMPT, where PROMPT is a text, or a number of
   tokens with `#` before it (#2000). llama.cpp's own settings, greedy, no log, no warm-up pass, a context just big
   enough: what its command line does for `-n 1`, without what that does besides. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "llama.h"

static void quiet(enum ggml_log_level level, const char *text, void *data) {
    (void)level, (void)text, (void)data;
}

static int fail(const char *what) {
    fprintf(stderr, "llama.cpp: %s\n", what);
    return 2;
}

int main(int argc, char **argv) {
    if (argc != 4) return fail("usage: first_token MODEL THREADS PROMPT");
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return fail("the model does not load");
    const struct llama_vocab *vocab = llama_model_get_vocab(model);

    int random = argv[3][0] == '#', n = random ? atoi(argv[3] + 1) : (int)strlen(argv[3]) + 2;
    llama_token *ids = malloc(n * sizeof *ids);
    for (int i = 0; random && i < n; i++) ids[i] = 3 + i * 7919 % (llama_vocab_n_tokens(vocab) - 3);
    if (!random) n = llama_tokenize(vocab, argv[3], strlen(argv[3]), ids, n, true, true);

    struct llama_context_params settings = llama_context_default_params();
    settings.n_ctx = n + 16;
    settings.n_batch = n;
    settings.n_threads = settings.n_threads_batch = atoi(argv[2]);
    struct llama_context *context = llama_init_from_model(model, settings);
    if (!context) return fail("no context of this size");
    if (llama_decode(context, llama_batch_get_one(ids, n))) return fail("llama_decode gave up");
    const float *logits = llama_get_logits_ith(context, -1);
    int best = 0;
    for (int i = 1; i < llama_vocab_n_tokens(vocab); i++)
        if (logits[i] > logits[best]) best = i;
    char piece[256];
    printf("%.*s\n", llama_token_to_piece(vocab, best, piece, sizeof piece, 0, true), piece);
    fflush(stdout);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
