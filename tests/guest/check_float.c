/* Floating point and vectors: checksums over many operations, which the harness compares with what the same static program
 * computes on the host; and that no thread sees another one's registers. Only operations whose result IEEE 754 or the SDM
 * defines to the bit are used (no rcpps, no fsin). */
#include <immintrin.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

#define N 512
#define ROUNDS 40

static double unit(uint64_t *state)
{
	return (double)(next_random(state) >> 11) / (double)(1ull << 53) + 0.25;
}

static uint64_t float_x87(uint64_t seed)
{
	uint64_t hash = HASH_START;
	long double x = 1, y = 2;

	for (int i = 0; i < N * ROUNDS; i++) {
		long double a = unit(&seed), b = unit(&seed), r;
		unsigned char bytes[16] = {0};

		x = x * a + b;
		y = y / b - a;
		if (x > 1e9L || x < -1e9L)
			x = a;
		if (y > 1e9L || y < -1e9L)
			y = b;
		asm volatile("fsqrt" : "=t"(r) : "0"(x < 0 ? -x : x));
		r += (long double)(int64_t)(y * 1000) + __builtin_truncl(x);
		asm volatile("frndint" : "=t"(y) : "0"(y * 8));
		y /= 8;
		memcpy(bytes, &r, 10);
		hash = hash_bytes(hash, bytes, 10);
	}
	return hash;
}

static uint64_t float_sse2(uint64_t seed)
{
	uint64_t hash = HASH_START;
	double a[N], b[N];
	float f[N];

	for (int i = 0; i < N; i++) {
		a[i] = unit(&seed);
		b[i] = unit(&seed);
		f[i] = (float)unit(&seed);
	}
	for (int round = 0; round < ROUNDS; round++) {
		for (int i = 0; i + 2 <= N; i += 2) {
			__m128d x = _mm_loadu_pd(a + i), y = _mm_loadu_pd(b + i);
			__m128i k;

			x = _mm_add_pd(_mm_mul_pd(x, y), _mm_sqrt_pd(_mm_div_pd(y, x)));
			x = _mm_min_pd(x, _mm_set1_pd(1e6));
			y = _mm_max_pd(_mm_sub_pd(y, _mm_shuffle_pd(x, x, 1)), _mm_set1_pd(0.125));
			k = _mm_xor_si128(_mm_castpd_si128(x), _mm_slli_epi64(_mm_castpd_si128(y), 3));
			k = _mm_add_epi32(_mm_shuffle_epi32(k, 0x1b), _mm_mullo_epi16(k, _mm_srli_epi32(k, 7)));
			k = _mm_packs_epi32(k, _mm_sad_epu8(k, _mm_castpd_si128(y)));
			hash = hash_bytes(hash, &k, sizeof(k));
			_mm_storeu_pd(a + i, x);
			_mm_storeu_pd(b + i, y);
		}
		for (int i = 0; i + 4 <= N; i += 4) {
			__m128 x = _mm_loadu_ps(f + i);

			x = _mm_add_ps(_mm_sqrt_ps(_mm_mul_ps(x, x)), _mm_div_ps(_mm_set1_ps(1), x));
			x = _mm_sub_ps(x, _mm_cvtepi32_ps(_mm_cvttps_epi32(x)));
			x = _mm_max_ps(x, _mm_set1_ps(0.01f));
			_mm_storeu_ps(f + i, x);
		}
	}
	hash = hash_bytes(hash, a, sizeof(a));
	hash = hash_bytes(hash, b, sizeof(b));
	return hash_bytes(hash, f, sizeof(f));
}

__attribute__((target("sse4.2,ssse3,popcnt"))) static uint64_t float_sse42(uint64_t seed)
{
	uint64_t hash = HASH_START, crc = 0;

	for (int i = 0; i < N * ROUNDS; i++) {
		__m128i x = _mm_set_epi64x((int64_t)next_random(&seed), (int64_t)next_random(&seed));
		__m128i y = _mm_set_epi64x((int64_t)next_random(&seed), (int64_t)next_random(&seed));

		x = _mm_shuffle_epi8(x, y);
		y = _mm_mullo_epi32(x, y);
		x = _mm_blendv_epi8(x, _mm_abs_epi16(y), _mm_cmpgt_epi64(x, y));
		crc = _mm_crc32_u64(crc, (uint64_t)_mm_extract_epi64(x, 1));
		crc += (uint64_t)_mm_popcnt_u64((uint64_t)_mm_cvtsi128_si64(y));
		crc += (uint64_t)_mm_cmpistri(x, y, _SIDD_CMP_EQUAL_ANY) + (uint64_t)_mm_testz_si128(x, y);
		y = _mm_castpd_si128(_mm_round_pd(_mm_cvtepi32_pd(y), _MM_FROUND_TO_ZERO));
		hash = hash_bytes(hash, &x, sizeof(x)) ^ crc;
		hash = hash_bytes(hash, &y, sizeof(y));
	}
	return hash;
}

__attribute__((target("avx"))) static uint64_t float_avx(uint64_t seed)
{
	uint64_t hash = HASH_START;
	double a[N], b[N];

	for (int i = 0; i < N; i++) {
		a[i] = unit(&seed);
		b[i] = unit(&seed);
	}
	for (int round = 0; round < ROUNDS; round++) {
		for (int i = 0; i + 4 <= N; i += 4) {
			__m256d x = _mm256_loadu_pd(a + i), y = _mm256_loadu_pd(b + i), z;

			z = _mm256_sqrt_pd(_mm256_div_pd(_mm256_add_pd(x, y), y));
			z = _mm256_blendv_pd(z, _mm256_permute2f128_pd(z, x, 0x21), _mm256_cmp_pd(x, y, _CMP_LT_OQ));
			z = _mm256_hadd_pd(z, _mm256_unpacklo_pd(y, x));
			z = _mm256_min_pd(_mm256_max_pd(z, _mm256_set1_pd(0.1)), _mm256_set1_pd(100));
			_mm256_storeu_pd(a + i, z);
			_mm256_maskstore_pd(b + i, _mm256_castpd_si256(_mm256_sub_pd(z, _mm256_set1_pd(1))), z);
		}
		hash = hash_bytes(hash, a, sizeof(a));
		hash = hash_bytes(hash, b, sizeof(b));
	}
	return hash;
}

__attribute__((target("avx2"))) static uint64_t float_avx2(uint64_t seed)
{
	uint64_t hash = HASH_START;
	static const int32_t data[1024] = {1, 2, 3, 5, 7, 11, 13, 17};

	for (int i = 0; i < N * ROUNDS / 4; i++) {
		uint64_t raw[8];
		__m256i x, y, g;

		for (int k = 0; k < 8; k++)
			raw[k] = next_random(&seed);
		x = _mm256_loadu_si256((__m256i *)raw);
		y = _mm256_loadu_si256((__m256i *)(raw + 4));
		g = _mm256_i32gather_epi32(data, _mm256_and_si256(x, _mm256_set1_epi32(1023)), 4);
		x = _mm256_mullo_epi32(_mm256_add_epi32(x, g), y);
		y = _mm256_permutevar8x32_epi32(_mm256_sllv_epi32(y, _mm256_and_si256(x, _mm256_set1_epi32(31))), x);
		x = _mm256_shuffle_epi8(_mm256_packus_epi16(x, y), _mm256_alignr_epi8(y, x, 5));
		x = _mm256_sub_epi64(x, _mm256_mul_epu32(y, g));
		hash = hash_bytes(hash, &x, sizeof(x));
		hash = hash_bytes(hash, &y, sizeof(y)) + (uint32_t)_mm256_movemask_epi8(y);
	}
	return hash;
}

__attribute__((target("fma,avx2"))) static uint64_t float_fma(uint64_t seed)
{
	uint64_t hash = HASH_START;

	for (int i = 0; i < N * ROUNDS / 4; i++) {
		__m256d x = _mm256_set_pd(unit(&seed), unit(&seed), unit(&seed), unit(&seed));
		__m256d y = _mm256_set_pd(unit(&seed), unit(&seed), unit(&seed), unit(&seed));

		for (int k = 0; k < 8; k++) {
			x = _mm256_fmadd_pd(x, y, _mm256_fnmsub_pd(y, y, x));
			y = _mm256_fmaddsub_pd(y, _mm256_set1_pd(0.5), x);
		}
		hash = hash_bytes(hash, &x, sizeof(x));
		hash = hash_bytes(hash, &y, sizeof(y));
	}
	return hash;
}

__attribute__((target("bmi,bmi2,lzcnt,popcnt"))) static uint64_t float_bmi(uint64_t seed)
{
	uint64_t hash = HASH_START;

	for (int i = 0; i < N * ROUNDS; i++) {
		uint64_t x = next_random(&seed), y = next_random(&seed), z;

		z = _pdep_u64(x, y) ^ _pext_u64(y, x) ^ _bzhi_u64(x, (unsigned)y & 63);
		z += _lzcnt_u64(x >> (y & 31)) + _tzcnt_u64(y << (x & 31)) + _andn_u64(x, y);
		z ^= _blsi_u64(x) + _blsr_u64(y) + _bextr_u64(x, 5, 17);
		hash = hash_bytes(hash, &z, sizeof(z));
	}
	return hash;
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static uint64_t float_avx512(uint64_t seed)
{
	uint64_t hash = HASH_START;
	double a[N];

	for (int i = 0; i < N; i++)
		a[i] = unit(&seed);
	for (int round = 0; round < ROUNDS; round++) {
		for (int i = 0; i + 8 <= N; i += 8) {
			__m512d x = _mm512_loadu_pd(a + i), y;
			__mmask8 m = _mm512_cmp_pd_mask(x, _mm512_set1_pd(1), _CMP_LT_OQ);
			__m512i k;
			__mmask64 bytes;

			y = _mm512_mask_sqrt_pd(x, m, x);
			y = _mm512_fmadd_pd(y, x, _mm512_maskz_div_pd((__mmask8)~m, x, y));
			y = _mm512_min_pd(_mm512_max_pd(y, _mm512_set1_pd(0.1)), _mm512_set1_pd(1000));
			k = _mm512_ternarylogic_epi64(_mm512_castpd_si512(x), _mm512_castpd_si512(y),
						      _mm512_set1_epi64((int64_t)next_random(&seed)), 0x96);
			k = _mm512_permutexvar_epi16(_mm512_rol_epi64(k, 13), k);
			bytes = _mm512_cmpgt_epi8_mask(k, _mm512_setzero_si512());
			k = _mm512_mask_add_epi8(k, bytes, k, _mm512_set1_epi8(3));
			hash = hash_bytes(hash, &k, sizeof(k)) ^ bytes;
			_mm512_mask_storeu_pd(a + i, (__mmask8)(m | 0x5a), y);
		}
	}
	return hash_bytes(hash, a, sizeof(a));
}

__attribute__((target("aes,pclmul"))) static uint64_t float_aes(uint64_t seed)
{
	__m128i x = _mm_set_epi64x((int64_t)next_random(&seed), 1), y = _mm_set_epi64x(2, (int64_t)next_random(&seed));

	for (int i = 0; i < N * ROUNDS; i++) {
		x = _mm_aesenc_si128(x, y);
		y = _mm_xor_si128(_mm_aesdeclast_si128(y, x), _mm_clmulepi64_si128(x, y, 0x10));
		x = _mm_add_epi64(x, _mm_aeskeygenassist_si128(y, 7));
	}
	return hash_bytes(hash_bytes(HASH_START, &x, sizeof(x)), &y, sizeof(y));
}

struct kind {
	const char *name;
	uint64_t (*run)(uint64_t seed);
	int have;
};

static struct kind kinds[] = {
	{"x87", float_x87, 1},	     {"sse2", float_sse2, 1}, {"sse4.2", float_sse42, 0}, {"avx", float_avx, 0},
	{"avx2", float_avx2, 0},     {"fma", float_fma, 0},   {"bmi", float_bmi, 0},	  {"aes", float_aes, 0},
	{"avx512", float_avx512, 0},
};
#define KINDS ((int)(sizeof(kinds) / sizeof(kinds[0])))

static void find_kinds(void)
{
	__builtin_cpu_init();
	for (int i = 0; i < KINDS; i++) {
		if (!strcmp(kinds[i].name, "sse4.2"))
			kinds[i].have = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
		else if (!strcmp(kinds[i].name, "avx"))
			kinds[i].have = __builtin_cpu_supports("avx");
		else if (!strcmp(kinds[i].name, "avx2"))
			kinds[i].have = __builtin_cpu_supports("avx2");
		else if (!strcmp(kinds[i].name, "fma"))
			kinds[i].have = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
		else if (!strcmp(kinds[i].name, "bmi"))
			kinds[i].have = __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
					__builtin_cpu_supports("lzcnt");
		else if (!strcmp(kinds[i].name, "aes"))
			kinds[i].have = __builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul");
		else if (!strcmp(kinds[i].name, "avx512"))
			kinds[i].have = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
					__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
	}
}

/* Each thread computes another kind over and over, while the others use the same registers for theirs. */
static uint64_t expected[16];
static int wrong[16];

static void *repeat(void *argument)
{
	int self = (int)(intptr_t)argument;

	for (int round = 0; round < 4; round++)
		for (int i = 0; i < KINDS; i++) {
			int k = (self + i) % KINDS;

			if (kinds[k].have && kinds[k].run(42) != expected[k])
				wrong[k]++;
		}
	return NULL;
}

int check_float(int argc, char **argv)
{
	pthread_t thread[6];
	int count = 0;

	(void)argc, (void)argv;
	find_kinds();
	for (int i = 0; i < KINDS; i++) {
		if (!kinds[i].have)
			continue;
		expected[i] = kinds[i].run(42);
		printf("VALUE float-%s %016llx\n", kinds[i].name, (unsigned long long)expected[i]);
		count++;
	}
	for (intptr_t i = 0; i < 6; i++)
		pthread_create(&thread[i], NULL, repeat, (void *)i);
	for (int i = 0; i < 6; i++)
		pthread_join(thread[i], NULL);
	for (int i = 0; i < KINDS; i++)
		if (wrong[i])
			FAIL("%s computed something else in %d of 24 threads' rounds", kinds[i].name, wrong[i]);
	/* Rounding modes and flags stay per thread and have effect. */
	asm volatile("ldmxcsr %0" ::"m"((unsigned){0x1f80 | 0x4000})); /* towards plus infinity */
	if (_mm_cvtsd_si32(_mm_set_sd(1.25)) != 2)
		FAIL("rounding up gives %d", _mm_cvtsd_si32(_mm_set_sd(1.25)));
	usleep(1000);
	if (_mm_cvtsd_si32(_mm_set_sd(1.25)) != 2)
		FAIL("the rounding mode was lost in a system call");
	asm volatile("ldmxcsr %0" ::"m"((unsigned){0x1f80}));
	printf("%d instruction sets, alone and in 6 threads\n", count);
	return 0;
}

/* String instructions over page borders, in both directions, against plain loops. */
int check_strings(int argc, char **argv)
{
	static unsigned char from[16384], to[16384], model[16384];
	uint64_t state = 99;

	(void)argc, (void)argv;
	for (size_t i = 0; i < sizeof(from); i++)
		from[i] = (unsigned char)next_random(&state);
	for (int round = 0; round < 4000; round++) {
		size_t n = next_random(&state) % 6000, a = next_random(&state) % 4000, b = next_random(&state) % 4000;
		void *d, *s;
		size_t c = n;
		int kind = (int)(next_random(&state) % 5);

		memset(to, 1, sizeof(to));
		memset(model, 1, sizeof(model));
		d = to + b, s = from + a;
		switch (kind) {
		case 0:
			asm volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(c)::"memory");
			for (size_t i = 0; i < n; i++)
				model[b + i] = from[a + i];
			break;
		case 1:
			c = n / 8;
			asm volatile("rep movsq" : "+D"(d), "+S"(s), "+c"(c)::"memory");
			for (size_t i = 0; i < n / 8 * 8; i++)
				model[b + i] = from[a + i];
			break;
		case 2:
			d = to + b + n, s = from + a + n;
			asm volatile("std; rep movsb; cld" : "+D"(d), "+S"(s), "+c"(c)::"memory");
			for (size_t i = 1; i <= n; i++)
				model[b + i] = from[a + i];
			break;
		case 3:
			c = n / 4;
			asm volatile("rep stosl" : "+D"(d), "+c"(c) : "a"(0x11223344) : "memory");
			for (size_t i = 0; i < n / 4; i++)
				memcpy(model + b + 4 * i, &(uint32_t){0x11223344}, 4);
			break;
		case 4: { /* overlapping, one byte ahead: a fill, byte by byte */
			d = to + b + 1, s = to + b;
			to[b] = model[b] = 0x77;
			asm volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(c)::"memory");
			memset(model + b, 0x77, n + 1);
			break;
		}
		}
		if (c)
			FAIL("round %d: the counter is %zu", round, c);
		if (memcmp(to, model, sizeof(to)))
			FAIL("round %d, kind %d, length %zu, from %zu to %zu differs", round, kind, n, a, b);
		/* repne scasb and repe cmpsb stop at the right place. */
		s = from + a;
		c = n;
		d = from + a;
		asm volatile("repne scasb" : "+D"(d), "+c"(c) : "a"(from[a + n]) : "memory", "cc");
		for (size_t i = 0; i < n; i++)
			if (from[a + i] == from[a + n]) {
				if ((unsigned char *)d != from + a + i + 1 || c != n - i - 1)
					FAIL("scasb stopped at %td instead of %zu", (unsigned char *)d - from - (ptrdiff_t)a, i + 1);
				break;
			}
	}
	printf("4000 string operations across pages\n");
	return 0;
}
