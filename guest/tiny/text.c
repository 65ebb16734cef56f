/* The built-in guest: the console, text and numbers, the command line. */
#include "tiny.h"

void put_char(char c)
{
    if (c == '\n')
        put_char('\r');
    while (!(in8(COM1 + UART_LSR) & LSR_THR_EMPTY))
        ;
    out8(COM1 + UART_DATA, (u8)c);
}

void put(const char *s)
{
    while (*s)
        put_char(*s++);
}

static void put_number(u64 value, unsigned base, int width)
{
    char digits[24];
    int n = 0;
    do
        digits[n++] = "0123456789abcdef"[value % base];
    while ((value /= base) || n < width);
    while (n)
        put_char(digits[--n]);
}

void put_decimal(u64 value) { put_number(value, 10, 0); }
void put_hex(u64 value, int width) { put("0x"); put_number(value, 16, width); }

static size_t length(const char *s) { size_t n = 0; while (s[n]) n++; return n; }

int same(const char *a, const char *b, size_t n)
{
    while (n && *a == *b)
        a++, b++, n--;
    return !n;
}

/* The text after `word` (which ends in '=' or stands alone) on the command line; NULL if it is not there. */
const char *option(const char *line, const char *word)
{
    size_t n = length(word);
    while (line && *line) {
        if (same(line, word, n) && (word[n - 1] == '=' || line[n] == ' ' || !line[n]))
            return line + n;
        while (*line && *line != ' ')
            line++;
        while (*line == ' ')
            line++;
    }
    return NULL;
}

/* The decimal number after `word` on the command line; 0 without. */
u32 number_after(const char *line, const char *word)
{
    const char *digits = option(line, word);
    u32 value = 0;
    while (digits && *digits >= '0' && *digits <= '9')
        value = value * 10 + (u32)(*digits++ - '0');
    return value;
}

/* The compiler may call these two. */
void *memset(void *to, int byte, size_t n)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(byte) : "memory");
    return start;
}

void *memcpy(void *to, const void *from, size_t n)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    return start;
}
