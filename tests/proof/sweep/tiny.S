/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A guest of 512 bytes: a boot sector that is up as soon as the BIOS is.
 *
 * It says "tiny ready" on its serial port, then LINES numbered lines at each tick of the clock (18.2 a second), in the
 * form that tests/harness.py checks; repeats each line that it is sent, between its own; and powers off when the power
 * button is pressed. With WRITES it also writes a sector of its disk at each tick, each time 4 KiB further on, in the 32
 * MiB from 32 MiB on. The registers are those of QEMU's q35: serial port at 0x3f8, ACPI's PM1 block at 0x600.
 */

#ifndef LINES
#define LINES 1
#endif

        .code16
        .globl _start
_start: cli
        xorw %ax, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movw $0x7c00, %sp
        cld
        movw $0x602, %dx            /* PM1_EN: have the power button's press show in PM1_STS */
        movw $0x100, %ax
        outw %ax, %dx
        movw $0x3fa, %dx            /* the port's FIFO */
        movb $0x07, %al
        outb %al, %dx
        movw $hello, %si
        call say
        movw $words, %di            /* where the next character that is sent to us goes */

tick:   sti
        hlt
        cli
        movw $0x600, %dx
        inw %dx, %ax
        testb $1, %ah
        jz 1f
        movw $0x604, %dx            /* PM1_CNT: SLP_EN, with S5 */
        movw $0x2000, %ax
        outw %ax, %dx
1:      call listen
        movb $LINES, %bh
2:      testb %bh, %bh
        jz tick
        call count
        decb %bh
#ifdef WRITES
        movw $packet, %si
        movw $0x4300, %ax           /* the BIOS's extended write */
        movb $0x80, %dl
        int $0x13
        addw $8, packet + 8
#endif
        jmp 2b

/* Take what was typed; a finished line is said. */
listen: movw $0x3fd, %dx
        inb %dx, %al
        testb $1, %al
        jz 3f
        movw $0x3f8, %dx
        inb %dx, %al
        cmpb $'\r', %al
        je 4f
        cmpb $'\n', %al
        je 4f
        cmpw $words + 200, %di
        jae listen
        stosb
        jmp listen
4:      movb $0, (%di)
        movw $words, %di
        movw $words, %si
        call say
        movw $newline, %si
        call say
        jmp listen
3:      ret

/* The next numbered line. */
count:  movw $digits + 9, %si
5:      incb (%si)
        cmpb $'9', (%si)
        jbe 6f
        movb $'0', (%si)
        decw %si
        jmp 5b
6:      movw $line, %si
        call say
        incb start
        cmpb $26, start
        jb 7f
        movb $0, start
7:      movb start, %ah
        movw $60, %cx
8:      movb %ah, %al
        addb $'a', %al
        call put
        incb %ah
        cmpb $26, %ah
        jb 9f
        movb $0, %ah
9:      loop 8b
        movw $stop, %si
        /* falls through */

say:    lodsb
        testb %al, %al
        jz 3b
        call put
        jmp say

put:    pushw %ax
        pushw %dx
        movw $0x3fd, %dx
10:     inb %dx, %al
        testb $0x20, %al
        jz 10b
        popw %dx
        popw %ax
        pushw %dx
        movw $0x3f8, %dx
        outb %al, %dx
        popw %dx
        ret

hello:  .asciz "tiny ready\r\n"
line:   .ascii "line "
digits: .asciz "0000000000 "
stop:   .ascii " ."
newline: .asciz "\r\n"
start:  .byte 0
#ifdef WRITES
packet: .byte 16, 0                 /* its size; one sector, of this program; to where */
        .word 1, 0x7c00, 0, 0, 1, 0, 0
#endif

        .org 510
        .word 0xaa55
        .equ words, 0x8000
