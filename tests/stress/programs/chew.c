/* What compilers and packers do: text is made, cut into words, counted in a tree, sorted, compressed and restored, and
 * expressions are parsed and evaluated. "chew SEED ROUNDS" prints a line a round; "chew text SEED BYTES" makes text. */
#include "common.h"

static uint64_t seed;

static uint32_t below(uint32_t limit) { return next_random(&seed) % limit; }

static size_t make_text(char *text, size_t bytes)
{
    size_t used = 0;
    while (used + 40 < bytes) {
        uint64_t kept = seed;
        seed = below(200) * 7919u + 1; /* one of 200 words */
        unsigned length = 2 + below(9);
        for (unsigned i = 0; i < length; i++)
            text[used++] = (char)('a' + below(26));
        seed = kept;
        next_random(&seed);
        if (below(7) == 0)
            used += (size_t)sprintf(text + used, "%u", below(100000));
        text[used++] = below(11) ? ' ' : '\n';
    }
    text[used] = 0;
    return used;
}

/* ── words in a tree, then sorted by how often they come ── */
struct node {
    struct node *left, *right;
    uint32_t count;
    char word[24];
};

static void insert(struct node **at, const char *word)
{
    while (*at) {
        int order = strcmp(word, (*at)->word);
        if (order == 0) {
            (*at)->count++;
            return;
        }
        at = order < 0 ? &(*at)->left : &(*at)->right;
    }
    struct node *made = calloc(1, sizeof *made);
    strncpy(made->word, word, sizeof made->word - 1);
    made->count = 1;
    *at = made;
}

static size_t flatten(struct node *node, struct node **list, size_t used)
{
    if (!node)
        return used;
    used = flatten(node->left, list, used);
    list[used++] = node;
    return flatten(node->right, list, used);
}

static int by_count(const void *a, const void *b)
{
    const struct node *x = *(struct node *const *)a, *y = *(struct node *const *)b;
    return x->count != y->count ? (x->count < y->count ? 1 : -1) : strcmp(x->word, y->word);
}

static uint64_t count_words(const char *text)
{
    struct node *root = NULL, **list;
    char word[24];
    unsigned length = 0;
    size_t words = 0;
    for (const char *at = text;; at++) {
        if ((*at >= 'a' && *at <= 'z') || (*at >= '0' && *at <= '9')) {
            if (length < sizeof word - 1)
                word[length++] = *at;
        } else if (length) {
            word[length] = 0;
            insert(&root, word);
            length = 0;
            words++;
        }
        if (!*at)
            break;
    }
    list = calloc(words + 1, sizeof *list);
    size_t distinct = flatten(root, list, 0);
    qsort(list, distinct, sizeof *list, by_count);
    uint64_t hash = distinct;
    for (size_t i = 0; i < distinct; i++) {
        hash = mix_bytes(hash, list[i]->word, strlen(list[i]->word));
        hash = mix(hash, list[i]->count);
        free(list[i]);
    }
    free(list);
    return hash;
}

/* ── LZ77 with a hash of three bytes; literals and (distance, length) ── */
static size_t compress(const uint8_t *in, size_t bytes, uint8_t *out)
{
    static int32_t heads[1 << 13];
    size_t used = 0, i = 0;
    memset(heads, 0xff, sizeof heads);
    while (i < bytes) {
        size_t length = 0, distance = 0;
        if (i + 3 < bytes) {
            uint32_t key = (in[i] | in[i + 1] << 8 | in[i + 2] << 16) * 2654435761u >> 19;
            int32_t before = heads[key];
            heads[key] = (int32_t)i;
            if (before >= 0 && i - (size_t)before < 60000) {
                while (length < 255 && i + length < bytes && in[(size_t)before + length] == in[i + length])
                    length++;
                distance = i - (size_t)before;
            }
        }
        if (length >= 4) {
            out[used++] = 1, out[used++] = (uint8_t)distance, out[used++] = (uint8_t)(distance >> 8), out[used++] = (uint8_t)length;
            i += length;
        } else {
            out[used++] = 0, out[used++] = in[i++];
        }
    }
    return used;
}

static size_t restore(const uint8_t *in, size_t bytes, uint8_t *out)
{
    size_t used = 0;
    for (size_t i = 0; i < bytes;) {
        if (in[i] == 0) {
            out[used++] = in[i + 1];
            i += 2;
        } else {
            size_t distance = in[i + 1] | (size_t)in[i + 2] << 8;
            for (unsigned n = in[i + 3]; n; n--, used++)
                out[used] = out[used - distance];
            i += 4;
        }
    }
    return used;
}

/* ── expressions: written at random, parsed by recursive descent ── */
static void write_expression(char **at, int depth)
{
    if (depth == 0 || below(5) == 0) {
        *at += sprintf(*at, "%u", below(1000));
        return;
    }
    *(*at)++ = '(';
    write_expression(at, depth - 1);
    *(*at)++ = "+-*/%&^"[below(7)];
    write_expression(at, depth - 1);
    *(*at)++ = ')';
}

static int32_t evaluate(const char **at)
{
    if (**at != '(')
        return (int32_t)strtol(*at, (char **)(uintptr_t)at, 10);
    ++*at;
    int32_t left = evaluate(at);
    char operation = *(*at)++;
    int32_t right = evaluate(at);
    ++*at;
    switch (operation) {
    case '+': return (int32_t)((uint32_t)left + (uint32_t)right);
    case '-': return (int32_t)((uint32_t)left - (uint32_t)right);
    case '*': return (int32_t)((uint32_t)left * (uint32_t)right);
    case '/': return right == 0 || right == -1 ? left : left / right;
    case '%': return right == 0 || right == -1 ? 0 : left % right;
    case '&': return left & right;
    default: return left ^ right;
    }
}

static uint64_t round_of(uint32_t number)
{
    static char text[40000], source[1 << 18];
    static uint8_t packed[2 * sizeof text], back[2 * sizeof text];
    seed = number * 0x9e3779b97f4a7c15u + 12345;
    size_t bytes = make_text(text, sizeof text);
    uint64_t hash = count_words(text);
    size_t small = compress((const uint8_t *)text, bytes, packed);
    if (restore(packed, small, back) != bytes || memcmp(back, text, bytes)) {
        printf("round %u: what was compressed is not restored\n", number);
        exit(1);
    }
    hash = mix_bytes(hash, packed, small);
    for (int i = 0; i < 20; i++) {
        char *end = source;
        const char *at = source;
        write_expression(&end, 9);
        *end = 0;
        hash = mix(hash, (uint32_t)evaluate(&at));
    }
    double sum = 0;
    for (int i = 1; i < 2000; i++)
        sum += (double)(i * 7 % 13) / i;
    return mix_bytes(hash, &sum, sizeof sum);
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "text")) {
        size_t bytes = strtoul(argv[3], NULL, 10);
        char *text = malloc(bytes + 64);
        seed = strtoul(argv[2], NULL, 10) * 31 + 7;
        return fwrite(text, 1, make_text(text, bytes), stdout) == 0;
    }
    uint32_t first = argc > 1 ? (uint32_t)atoi(argv[1]) : 0, rounds = argc > 2 ? (uint32_t)atoi(argv[2]) : 5;
    for (uint32_t i = first; i < first + rounds; i++)
        printf("round %u: %016llx\n", i, (unsigned long long)round_of(i));
    return 0;
}
