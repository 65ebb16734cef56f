/* The built-in guest: what its parts know of each other. */
#ifndef TINY_H
#define TINY_H

#include "hardware.h"

#define START_INFO_MAGIC 0x336ec578u

struct start_info { /* Xen's hvm_start_info, version 1 */
    u32 magic, version, flags, nr_modules;
    u64 modlist, cmdline, rsdp, memmap;
    u32 memmap_entries, reserved;
};

struct memmap_entry { u64 base, size; u32 type, reserved; };

extern int quiet;         /* print little */
extern u16 pm1a_control;  /* the port that powers off, as the FADT says */
extern u8 s5_type;        /* and what to write there, as the DSDT says */

/* text.c */
void put_char(char c);
void put(const char *s);
void put_decimal(u64 value);
void put_hex(u64 value, int width);
int same(const char *a, const char *b, size_t n);
const char *option(const char *line, const char *word);
u32 number_after(const char *line, const char *word);
void *memset(void *to, int byte, size_t n);
void *memcpy(void *to, const void *from, size_t n);

/* machine.c */
void show_cpu(void);
u64 show_memory(const struct start_info *info);
int show_acpi(const struct start_info *info);

/* main.c, called from start.S */
void tiny_main(const struct start_info *info);

#endif
