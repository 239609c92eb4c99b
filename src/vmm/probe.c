/* hostel-vmm --probe: which engine a VM gets here, and why the others cannot be had. */
#include "vmm/probe.h"

#include <stdbool.h>
#include <string.h>

#include "base/loop.h"
#include "engine/engine.h"
#include "vmm/terminal.h"

#define ENGINES_MAX 8

struct verdict {
	const struct engine *engine;
	struct error why; /* code 0: it works */
	uint64_t nanoseconds;
};

static struct verdict ask(const struct engine *engine)
{
	struct verdict v = {.engine = engine};
	uint64_t began = clock_now();

	engine->probe(&v.why);
	v.nanoseconds = clock_now() - began;
	return v;
}

static double milliseconds(const struct verdict *v)
{
	return (double)v->nanoseconds / 1e6;
}

/* RFC 8259, section 7: what may not stand in a string as it is. */
static void put_string(FILE *to, const char *text)
{
	putc('"', to);
	for (; *text; text++) {
		if (*text == '"' || *text == '\\')
			fprintf(to, "\\%c", *text);
		else if ((unsigned char)*text < 0x20)
			fprintf(to, "\\u%04x", (unsigned char)*text);
		else
			putc(*text, to);
	}
	putc('"', to);
}

static void tell_json(FILE *to, const struct verdict *verdicts, unsigned count, const struct engine *chosen)
{
	fputs("{\"engine\":", to);
	if (chosen)
		put_string(to, chosen->name);
	else
		fputs("null", to);
	fputs(",\"engines\":[", to);
	for (unsigned i = 0; i < count; i++) {
		const struct verdict *v = &verdicts[i];

		fputs(i ? ",{\"name\":" : "{\"name\":", to);
		put_string(to, v->engine->name);
		fprintf(to, ",\"works\":%s,\"milliseconds\":%.1f", v->why.code ? "false" : "true", milliseconds(v));
		if (v->why.code) {
			fputs(",\"reason\":", to);
			put_string(to, v->why.text);
		}
		putc('}', to);
	}
	fputs("]}\n", to);
}

static void tell_text(FILE *to, const struct verdict *verdicts, unsigned count, const struct engine *chosen)
{
	fprintf(to, "engine: %s\n", chosen ? chosen->name : "none");
	for (unsigned i = 0; i < count; i++) {
		const struct verdict *v = &verdicts[i];

		if (v->why.code)
			fprintf(to, "%s: no (%.1f ms): %s\n", v->engine->name, milliseconds(v), v->why.text);
		else
			fprintf(to, "%s: yes (%.1f ms)\n", v->engine->name, milliseconds(v));
	}
}

bool vmm_probe(FILE *to, bool json)
{
	struct verdict verdicts[ENGINES_MAX];
	const struct engine *chosen = NULL;
	unsigned count = 0;

	for (const struct engine *const *engine = engines; *engine && count < ENGINES_MAX; engine++) {
		verdicts[count] = ask(*engine);
		if (!chosen && !verdicts[count].why.code)
			chosen = *engine;
		count++;
	}
	(json ? tell_json : tell_text)(to, verdicts, count, chosen);
	return chosen;
}

const struct engine *vmm_choose_engine(char *note, size_t size, struct error *err)
{
	note[0] = 0;
	for (const struct engine *const *engine = engines; *engine; engine++) {
		struct error why = {0};

		if ((*engine)->probe(&why) == 0)
			return *engine;
		if (engine[1])
			snprintf(note, size, "engine %s, not %s: %s", engine[1]->name, (*engine)->name, why.text);
		else
			*err = why;
	}
	error_wrap(err, "no engine can run here; the last one tried says");
	return NULL;
}
